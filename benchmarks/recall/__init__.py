"""A small recall model, the documents it was trained on, and its evaluation."""
