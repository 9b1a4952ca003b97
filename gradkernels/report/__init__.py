"""What people look at: a table for the terminal, a picture of the gradient flow."""
