"""The operators, one module each: its meaning (``reference``), its other forms (``FORMS``) and its public function."""
