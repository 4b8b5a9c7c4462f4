"""Measuring instruction sets and models: distances between tasks, information gain of key parts."""
