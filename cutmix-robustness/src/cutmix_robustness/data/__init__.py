"""Images of both papers: data sets, corruptions and out-of-distribution inputs."""
