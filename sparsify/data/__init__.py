"""Texts, question sets and the windows of inputs cut from them."""
