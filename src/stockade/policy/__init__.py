"""What a policy should allow: read off what was observed. Pure: runs nothing, changes nothing."""
