"""Parts of ``audiomae.data.prepare``: the folder, the names in it, its journal, and the conversion of a clip."""
