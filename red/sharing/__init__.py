"""From a trained student to a folder that others can load, trust and name: export, its proof, licences."""
