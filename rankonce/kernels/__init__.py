"""Operations of the packed pass: plain tensors in, plain tensors out."""
