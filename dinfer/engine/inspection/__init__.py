"""What a rank tells of the KV that it holds, and how that compares with transformers' own forward."""
