"""Datasets: thousands of labelled clips as one object, each clip an ordinary job."""
