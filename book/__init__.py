"""The book: its pages, and the builder that executes and renders them. Not part of the library."""
