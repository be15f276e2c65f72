"""Virtual machines behind one interface; libvirt is the one implementation and imported by it alone."""
