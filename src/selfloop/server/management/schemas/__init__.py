"""Bodies and answers, under the specification's own schema names, a file per resource. Unknown fields are refused."""
