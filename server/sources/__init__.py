"""What clips are made from: uploaded pictures and videos, and earlier clips. Kept as long as a job refers to them."""
