"""Does NAPO work? A study on LastFM, MovieLens-100K and Steam that anyone can repeat: see README.md."""
