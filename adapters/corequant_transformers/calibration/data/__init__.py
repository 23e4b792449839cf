"""Calibration data: files to documents, documents to token windows."""
