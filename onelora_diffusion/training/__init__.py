"""What a training loop needs beside the model: randomness, EMA, budget, stopping, metrics, checkpoints."""
