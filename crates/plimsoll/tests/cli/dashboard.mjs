// Opens the dashboard as an operator's browser does. Arguments: playwright-core's folder, the address, a folder for pictures.
// Leaves: exit status 0, or what was wrong on standard error.
import assert from 'node:assert/strict';
import { createRequire } from 'node:module';

const [folder, address, pictures] = process.argv.slice(2);
const { chromium } = createRequire(`${folder}/`)('playwright-core');
const browser = await chromium.launch({ executablePath: '/usr/bin/chromium', args: ['--no-sandbox', '--disable-dev-shm-usage'] });
try {
  const page = await browser.newPage({ viewport: { width: 1280, height: 1000 }, colorScheme: 'light' });
  const wrong = [];
  page.on('console', (message) => ['error', 'warning'].includes(message.type()) && wrong.push(message.text()));
  page.on('pageerror', (error) => wrong.push(String(error)));
  page.on('request', (request) => {
    if (new URL(request.url()).origin !== new URL(address).origin) wrong.push(`asks ${request.url()}`);
  });
  const picture = (name) => page.screenshot({ path: `${pictures}/${name}.png`, fullPage: true });
  const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const isTooWide = () => page.evaluate(() => document.documentElement.scrollWidth > document.documentElement.clientWidth);

  await page.goto(address);
  await page.getByRole('button', { name: 'lonely' }).waitFor();
  assert.equal(new URL(page.url()).hash, '', 'the token stays in the address');
  await page.locator('#host-numbers dd', { hasText: '64M' }).waitFor();
  await page.locator('#map i').nth(255).waitFor();
  await page.locator('#why li').first().waitFor();
  await page.locator('#plot-memory svg').waitFor();
  await picture('light');
  const light = await background();
  await page.emulateMedia({ colorScheme: 'dark' });
  assert.notEqual(await background(), light, 'dark looks as light');
  await picture('dark');
  const toggle = page.getByRole('button', { name: 'Theme' });
  await toggle.click();
  assert.equal(await background(), light, 'the theme does not come before the system\'s');
  await toggle.click();
  await toggle.click();

  await page.setViewportSize({ width: 390, height: 844 });
  assert.equal(await isTooWide(), false, 'a phone has to scroll sideways');
  await picture('phone');
  await page.emulateMedia({ colorScheme: 'light' });
  await page.setViewportSize({ width: 1280, height: 1000 });

  // By keyboard alone: to the machine, to its weight, and change it.
  const until = async (isThere, what) => {
    for (let presses = 0; presses < 40; presses += 1) {
      await page.keyboard.press('Tab');
      if (await page.evaluate(isThere)) return;
    }
    assert.fail(`tabs do not lead to ${what}`);
  };
  await page.evaluate(() => document.activeElement.blur());
  await until(() => document.activeElement.className === 'name', 'a machine');
  await page.keyboard.press('Enter');
  await until(() => document.activeElement.id === 'weight', 'its weight');
  await page.keyboard.press('Control+A');
  await page.keyboard.type('no number');
  await page.keyboard.press('Enter');
  await page.locator('#said', { hasText: 'is no weight' }).waitFor();
  await page.keyboard.press('Control+A');
  await page.keyboard.type('7321');
  await page.keyboard.press('Enter');
  await page.locator('#said', { hasText: 'in force' }).waitFor();
  await picture('changed');
  assert.deepEqual(wrong, [], 'the browser complains');
} finally {
  await browser.close();
}
