"""The glue to megatron-core. The only folder that imports it; the rest of the package sees roles and layouts."""
