"""Picture and video files to arrays and back; the only room that imports Pillow and PyAV."""
