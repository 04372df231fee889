"""Tables and figures as pure functions of records and the papers' numbers. No torch below here."""
