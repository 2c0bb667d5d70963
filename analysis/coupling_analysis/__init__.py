"""Studies of saved runs: tidy tables with one number a row, and the pictures drawn from them."""
