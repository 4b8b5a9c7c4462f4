"""What a finished run is good for: answering prompts, and export."""
