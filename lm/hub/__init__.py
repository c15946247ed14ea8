"""To and from Hugging Face: models, configs and tokenizers. No other folder of lm knows its formats."""
