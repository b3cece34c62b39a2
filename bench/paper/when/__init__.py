"""When does a moving reference help? A study by factors; see PLAN.md."""
