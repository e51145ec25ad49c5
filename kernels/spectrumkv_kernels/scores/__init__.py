"""How much attention tokens receive."""
