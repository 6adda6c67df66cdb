"Embedded data sets: drawn street scenes, and the blue marble."
