"""The virtual bench's images: what is built, from what, and where it lies. How artefacts are built: `artefacts`."""
