"""The Triton twins of the stages in `reference`, under the same names and signatures."""
