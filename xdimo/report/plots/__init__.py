"""Pictures of a campaign."""
