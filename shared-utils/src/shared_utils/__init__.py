"""What all projects share: `seeding`, `logging`, `tables` (a paper's table as a file), `runlog`, `report`."""
