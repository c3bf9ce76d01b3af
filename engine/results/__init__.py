"""Reading, comparing and drawing what runs wrote. What trains knows nothing of it."""
