"""Which training examples decided an answer: scores as tables, the records behind them, and datasets without them."""
