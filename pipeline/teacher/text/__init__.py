"""Text of any source to rows of token ids, with the tokens that the loss is on."""
