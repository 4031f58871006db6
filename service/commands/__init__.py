# SPDX-License-Identifier: Apache-2.0
"""What `warmfleet` does besides starting the service: plan, check, scale, roll."""
