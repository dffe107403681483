"""Archive -> store: Dask, SimpleITK, FAISS and a small autoencoder."""
