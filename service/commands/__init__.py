# SPDX-License-Identifier: Apache-2.0
"""What `warmfleet` does besides starting the service: download, plan, check, scale, roll."""
