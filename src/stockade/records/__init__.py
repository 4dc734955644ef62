"""The vocabulary as frozen records. No I/O, and nothing imported from the rest of Stockade."""
