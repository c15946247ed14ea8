"""To and from Hugging Face: models, their configs and tokenizers. Nothing else knows that there is such a thing."""
