"""What the steps tell: measured, logged, printed and drawn."""
