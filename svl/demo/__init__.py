"""The bundled models and their benchmarks: scenes of coloured shapes, and texts in the public domain."""
