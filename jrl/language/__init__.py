"""Language models: texts as Markov decision processes over tokens, trained by the same kernels."""
