# SPDX-License-Identifier: Apache-2.0
"""What the API speaks: a file for each dialect, and the way of a request that they share."""
