"""Learning from judged answers: what a step sees, its losses, and the rewards of held-out rows."""
