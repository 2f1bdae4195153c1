"""What every stage shares: errors a user reads, files that are whole or absent, models and wheels by digest."""
