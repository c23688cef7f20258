"""Personal data in the texts of rankings: found (`find`, `keys`), masked (`mask`), and treated as the profile says (`policy`)."""
