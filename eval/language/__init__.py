"""Language models, measured: text, recall from the context, tasks of lm-eval."""
