import { Anchor } from '@mantine/core';
import { Link } from 'react-router';
import css from './BackLink.module.css';
import { Icon } from './Icon';

/** From a screen to the list that it came from. */
export function BackLink({ to, children }: { to: string; children: string }) {
  return (
    <Anchor component={Link} to={to} size="sm" className={css.back ?? ''}>
      <Icon name="left" size={18} /> {children}
    </Anchor>
  );
}
