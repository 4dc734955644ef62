"""Write the schemas anew, after a record has changed."""

from stockade.schema import write

write()
