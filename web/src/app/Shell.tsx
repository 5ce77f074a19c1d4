import { Icon, type IconName } from '@/components/Icon';
import { Brand } from '@/components/Brand';
import { ErrorNote } from '@/components/ErrorNote';
import { claimConversation, forgetUser, useConversationOwner } from '@/features/generate/conversation';
import { JobWatch } from '@/features/notify/JobWatch';
import { meQuery, signOut } from '@/features/session/queries';
import { whenSignedOut } from '@/lib/api';
import { LANGUAGES, setLanguage, type Language } from '@/lib/i18n';
import { Menu, UnstyledButton, useMantineColorScheme, type MantineColorScheme } from '@mantine/core';
import { useQuery, useQueryClient } from '@tanstack/react-query';
import { useEffect } from 'react';
import { useTranslation } from 'react-i18next';
import {
  Link,
  Navigate,
  NavLink,
  Outlet,
  ScrollRestoration,
  useLocation,
  useNavigate,
  useNavigation,
} from 'react-router';
import css from './Shell.module.css';

const SCREENS = [
  { to: '/', icon: 'spark', words: 'app.generate' },
  { to: '/training', icon: 'layers', words: 'app.training' },
  { to: '/batches', icon: 'file', words: 'app.batches' },
  { to: '/gpus', icon: 'chip', words: 'app.gpus' },
  { to: '/keys', icon: 'key', words: 'app.keys' },
  { to: '/people', icon: 'people', words: 'app.people', admin: true },
] as const satisfies readonly { to: string; icon: IconName; words: string; admin?: true }[];

/** Everything behind the sign-in: navigation, settings, and the screen that the address names. */
export function Shell() {
  const { t } = useTranslation();
  const me = useQuery(meQuery);
  const location = useLocation();
  const navigate = useNavigate();
  const queryClient = useQueryClient();
  const loading = useNavigation().state === 'loading';

  useEffect(() => {
    whenSignedOut(() => {
      forgetUser();
      queryClient.clear();
      if (window.location.pathname === '/sign-in') return; // another request was told the same
      void navigate('/sign-in', { state: { from: window.location.pathname + window.location.search } });
    });
  }, [navigate, queryClient]);

  // Screens wait for this: they show the tab's conversation, and go on with it.
  const user = me.data?.user.id;
  const owner = useConversationOwner();
  useEffect(() => {
    if (user) claimConversation(user);
  }, [user]);

  if (me.data === null) {
    return <Navigate to="/sign-in" replace state={{ from: location.pathname + location.search }} />;
  }
  return (
    <div className={css.shell}>
      <a className={css.skip} href="#content">
        {t('app.skip')}
      </a>
      <nav className={css.side} aria-label={t('app.nav')}>
        <NavLink to="/" className={css.brand}>
          <Brand />
        </NavLink>
        <div className={css.nav}>
          {SCREENS.filter((screen) => !('admin' in screen) || me.data?.admin).map(({ to, icon, words }) => (
            <NavLink key={to} to={to} end={to === '/'} className={css.link ?? ''}>
              <Icon name={icon} />
              <span>{t(words)}</span>
            </NavLink>
          ))}
        </div>
        <div className={css.foot}>
          <Settings name={me.data?.user.name} />
        </div>
      </nav>
      <main className={css.main} id="content" tabIndex={-1} aria-busy={loading}>
        {me.isError ? (
          <ErrorNote error={me.error} retry={() => void me.refetch()} />
        ) : user && user === owner ? (
          <>
            <Outlet />
            <JobWatch />
          </>
        ) : null}
      </main>
      <ScrollRestoration />
    </div>
  );
}

const THEMES: readonly MantineColorScheme[] = ['auto', 'light', 'dark'];

function Settings({ name }: { name: string | undefined }) {
  const { t, i18n } = useTranslation();
  const { colorScheme, setColorScheme } = useMantineColorScheme();
  const queryClient = useQueryClient();
  const navigate = useNavigate();
  const leave = async () => {
    forgetUser();
    await signOut();
    queryClient.clear();
    await navigate('/sign-in');
  };
  return (
    <Menu position="top-start" width={230} shadow="md">
      <Menu.Target>
        <UnstyledButton className={css.account} aria-label={`${t('app.settings')} · ${name ?? ''}`}>
          <Icon name="person" />
          <span>{name ?? '…'}</span>
        </UnstyledButton>
      </Menu.Target>
      <Menu.Dropdown>
        {name ? <Menu.Label>{t('app.signedInAs', { name })}</Menu.Label> : null}
        <Menu.Item component={Link} to="/account" leftSection={<Icon name="person" size={16} />}>
          {t('app.account')}
        </Menu.Item>
        <Menu.Label>{t('app.language')}</Menu.Label>
        <Menu.RadioGroup value={i18n.language} onChange={(code) => void setLanguage(code as Language)}>
          {Object.entries(LANGUAGES).map(([code, label]) => (
            <Menu.RadioItem key={code} value={code} lang={code} closeMenuOnClick>
              {label}
            </Menu.RadioItem>
          ))}
        </Menu.RadioGroup>
        <Menu.Label>{t('app.theme')}</Menu.Label>
        <Menu.RadioGroup value={colorScheme} onChange={(scheme) => setColorScheme(scheme as MantineColorScheme)}>
          {THEMES.map((each) => (
            <Menu.RadioItem key={each} value={each} closeMenuOnClick>
              {t(`app.theme_${each}`)}
            </Menu.RadioItem>
          ))}
        </Menu.RadioGroup>
        <Menu.Divider />
        <Menu.Item leftSection={<Icon name="leave" size={16} />} onClick={() => void leave()}>
          {t('app.signOut')}
        </Menu.Item>
      </Menu.Dropdown>
    </Menu>
  );
}
