"""What exits show of a text: hidden states, features, confidences, and what every threshold would do."""
