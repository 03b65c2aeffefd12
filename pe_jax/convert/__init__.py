"""PyTorch's and our own weights, both ways, without PyTorch: `weights` knows files, `pe` knows names and shapes."""
