"""`zoo export`: one size or a checkpoint; the forms and the card of what a run exports."""
