"""Models of images and text: questions, and how much of the answers is sight."""
